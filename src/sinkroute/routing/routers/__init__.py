"""Routers, one method a file."""

__all__: list[str] = []
