"""Report of a comparison: headline, figures, page, hub card."""
