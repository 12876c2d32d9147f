"""Where photos come from: published datasets and folders of one's own."""
