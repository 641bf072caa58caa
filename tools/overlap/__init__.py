"""Measures on this machine how much of scoring, and of training, is hidden behind generation."""
