"""Auxiliary losses, one a file; any router takes any of them: `losses=["z-loss"]`, `losses={"z-loss": 1e-3}`."""

__all__: list[str] = []
