"""Finding the tile shapes of the GEMM kernels that are fastest on a device, for its table.

``candidates`` lists what may be tried, ``compiled`` drops what the compiler shows to be hopeless,
``problems`` runs and checks one kernel, ``search`` measures, ``table`` writes, ``command`` is the
command line.
"""
