"""Record formats, one file each. The table is `loratune.tables.FORMATS`."""
