"""Speed and memory: this project against AdapterHub's `adapters`, and against the matrix products alone.

Nothing is imported here, since the interpreter of the baseline, which has other versions, loads this package too.
"""
