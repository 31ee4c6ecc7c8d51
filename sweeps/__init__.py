"""Which trials run and which one wins: definition, search, gate, promotion, report."""
