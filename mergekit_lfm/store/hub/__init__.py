"""Models on the Hub: their names, and their files at one commit. Modules that use the network are imported lazily."""

from mergekit_lfm.store.hub.names import HubName, display_name, hub_name, nearest_name, repository

__all__ = ["HubName", "display_name", "hub_name", "nearest_name", "repository"]
