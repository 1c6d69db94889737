"""Files that one step leaves for the next: statistics, transforms, patches, adapters, facts."""
