"""Raw products to CORPUS: GDAL readers, tiles, splits, shards, and the synthetic demo world."""
