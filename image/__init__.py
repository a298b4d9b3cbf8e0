"""Pictures that are edited: editors, dataset updates, masks and figures."""
