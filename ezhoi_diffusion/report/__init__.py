"""A comparison, told: headline, figures, page, hub card."""
