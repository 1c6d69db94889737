"""A folder that is complete or not there: laid out, written, described, verified, pushed."""
