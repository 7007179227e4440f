"""Models: loading, adapters, export."""
