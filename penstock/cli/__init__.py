"""The commands, and the only place that builds objects and joins them.

`settings` reads what a person asked for, `build` makes engine, text service, catalog and server from it,
`offline` is the Python API. It is not called by any other room.
"""
