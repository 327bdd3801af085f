"""Who may ask, and who answers: keys and the catalog of models.

Not wire formats (those end in `server`) and not engines (known only through the ports of `core`).
Called by `server` for every request.
"""
