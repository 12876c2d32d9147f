"""Two folders of images in, the field's metrics out, with the protocol written beside them: see `__main__`."""
