"""The words that every room speaks: ids, requests, deltas, parameters, errors and ports.

Nothing here does I/O, keeps state or imports anything but the standard library and msgspec.
"""
