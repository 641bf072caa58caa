"""Several teachers in one run: which scores which prompt, and the scores of a mixture of them."""
