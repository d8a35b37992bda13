"""Scripts that made what ships in `loratune/box`; not part of the installed package."""
