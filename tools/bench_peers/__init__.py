"""Installs the engines that `penstock bench compare` sets Penstock beside, each in its own environment."""
