"""Models on the Hub: their names, and their files at one commit. What talks to the Hub is imported when needed."""

from mergekit_lfm.store.hub.names import HubName, called, hub_name, repository

__all__ = ["HubName", "called", "hub_name", "repository"]
