"""Speed and memory of this project compared with AdapterHub's `adapters` and with its matrix products alone.

Nothing is imported here: the baseline's interpreter, which has different package versions, imports this package too.
"""
