"""Pictures, interferogram stacks and maps on disk, read and written a window at a time. Knows nothing of networks.

source   one picture or map            open_source(path).read(y0, y1, x0, x1) -> [h, w, C]
stack    frames and their stack.yaml   open_stack(folder).read(y0, y1, x0, x1) -> [J, K, h, w]
writers  maps of any size              MapWriter(path, shape, dtype).write(y0, x0, block)
preview  small pictures of large maps  read_decimated, save_preview
synth    a synthetic wafer stack       synth(folder, size=(H, W))
"""
