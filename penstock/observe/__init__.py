"""Sinks for what happens: clock, metrics, logs.

Rooms above emit plain events through the ports of `core`; nothing here decides anything, blocks or
imports a room above `core`. Built and joined by `cli`, read by `server` (`/metrics`).
"""
