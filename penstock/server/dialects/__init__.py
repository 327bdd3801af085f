"""The wire formats: each dialect is a thin adapter to `GenerateRequest`, and none calls another.

Called by the route table; nothing here knows sockets, keys or engines.
"""
