"""Pictures that are edited: editors, masks and figures."""
