"""Files for clusters, and their checks; docs/cluster.md says how they are used."""
