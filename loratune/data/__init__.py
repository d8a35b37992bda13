"""Data: files -> records -> examples -> rows. Follow it in that order: files, records, render, pack, feed."""
