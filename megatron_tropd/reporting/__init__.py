"""What a person sees of a run: progress, metrics, curves, report."""
