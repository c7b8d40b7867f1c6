"""Diffusion policies for offline reinforcement learning; mdpt.data, mdpt.models and mdpt.mdpt are its three floors."""
