"""The command line."""


def main() -> int:
    """Entry point (replaced below)."""
    return 0
