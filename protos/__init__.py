"""The wire, version 1: the ``.proto`` files, the code generated from them, `columns` and `checks`."""
