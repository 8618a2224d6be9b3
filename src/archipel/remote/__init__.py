"""Experts whose weights stay on another machine: asked over HTTP, admitted by card and loss, left out where they fail."""
