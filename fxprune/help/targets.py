"""Targets

--target NAME says what file is written beside model.pt2, which always is. Whatever is written is run against the
pruned graph on seeded inputs at several batch sizes before it gets its name; a difference above the tolerance is an
error, and no file is left behind.

  eager      model.pt2, run by PyTorch on any device. Needs torch alone; loads without the model's class
  onnx       model.onnx, opset 18 to 20, no custom op; checked in onnxruntime on the CPU. Widths are kept at multiples
             of 8
  triton     model.pt2 whose block-sparse layers call a Triton kernel where a measured table says that it wins
             (--blocks). Needs a CUDA GPU to run; without a table every layer stays dense

`fxprune doctor` lists the targets of this installation, those of plugins included, with what each one needs and
whether it is there:

  fxprune doctor
  fxprune doctor --target onnx --json

What a target likes (multiples of channels) is its `granularity`; --align overrides it. A target of your own is one
file:
fxprune help plugins.

Half precision: the graph keeps the dtype of the model. Convert before compile, and the tolerance is that of the
dtype.
"""
