def read_trace(folder, figures):
    raise NotImplementedError
