"""How fast and how small: ours against AdapterHub's `adapters`, and against the matrix products alone.

Nothing is imported here, since the rival's interpreter, which has other versions, loads this package too.
"""
