"""Models in buckets of object stores: their addresses, their state, their files."""

from mergekit_lfm.store.buckets.names import BucketName, bucket_name

__all__ = ["BucketName", "bucket_name"]
