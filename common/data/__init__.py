"""Named data sources and the corpora built from them."""
