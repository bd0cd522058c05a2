"""What a model costs, why a map is attended the way it is, and where a model looked."""
