"""Wire in, wire out: the HTTP server and the dialects that clients speak.

Turns bytes into `GenerateRequest`s and `TextDelta`s into bytes. Not policy (that is `gateway`) and not
text or tokens: models are seen only as `ModelClient`s from the catalog. Built and started by `cli`.
"""
