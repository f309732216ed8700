"""Renderings of incidents and captures."""
