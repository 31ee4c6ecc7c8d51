"""From files to one proven snapshot: read, looked through, deduplicated, mixed, split, tokenised. Knows no model."""
