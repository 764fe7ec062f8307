"""Zeros inside weights

`--blocks 32x32 --flops 0.5` zeroes tiles of 32 outputs by 32 inputs in the weights of linear layers (queries, keys,
values, projections, feed-forward; patch embeddings and classifiers stay dense), after slicing if you say how much of
it (`--blocks '32x32{slice=0.7}'`), or let the data say (`slice=auto`, the default of `--prune ..,blocks` with data):
slicing leaves five amounts, tiles take the rest, each result is fitted to half of some samples, and the one whose
outputs stay closest to the dense ones on the other half is taken. It may well be slicing alone.

  fxprune compile model.pt --flops 0.5 --data data.npz --blocks 16x16
  fxprune compile model.pt --flops 0.5 --data data.npz --prune heads,ffn,blocks

`--importance lsp` ranks tiles by a second-order score from per-sample sums over tiles and gives every layer the share
at which its distortion grows as fast as all others', per MAC (`allocation=lsp` is the paper's rule); `magnitude`,
`wanda` and `obert` are the others. With data the kept tiles are fitted to what the dense layers did. `--sparse 2:4`
keeps two of every four inputs and puts the neurons of feed-forward parts in a better order.

Zeros are not speed. Reports say how many MACs are effective and how many are executed. A layer runs block-sparse only
where a table measured on the target says that it wins; otherwise its zeros stay in a dense weight and the report says
why ("kept dense: 0.90x at M=197"). `--target triton` calls a Triton kernel (fxprune[triton]), `--target onnx` plain
gathers and products; `fxprune tune` measures the table, once per device. No GPU table comes with fxprune: the kernel
compiles for sm_80, 86, 89 and 90 and its numerics are checked in Triton's interpreter, but it has not been run on a
GPU yet. In a checkout, python tools/bench/gpu.py is the benchmark to run there.

Small ViT on digits (dense 98.2), accuracy at shares of all MACs that are not zero, tiles of 32x32, one seed:

                                                      0.75   0.6   0.5   0.4   0.3
    lsp, recovered (the default)                      98.4  97.8  97.3  93.3  82.4
    lsp, the paper's allocation, recovered            98.2  98.0  97.6  92.0  81.6
    the same without the power term                   98.0  97.3  94.2  88.4  48.4
    obert, recovered                                  97.6  97.6  96.7  96.2  91.8
    lsp scores, the same share everywhere, recovered  92.9  88.2  84.0  64.7  10.2
    magnitude, recovered                              82.7  46.7  10.0  10.2  10.2
    lsp, not recovered                                97.3  95.8  94.2  69.8  44.2

Smaller tiles lose less (16x16: 98.0, 98.2, 97.1, 94.9, 86.9), 64x64 more (98.0, 97.1, 93.1, 90.0, 80.4); obert is
better than the default from 0.4 down.

Larger models at half of the MACs, by tile, one seed. On MiniLM the same share everywhere is ahead of what the
distortion curves allocate at 0.75 (86.2 to 86.6 against 85.6 to 86.2, recovered) and, but for 64x64 at 0.5, without
recovery:

    MiniLM on STS-B (dense 86.7; 256 sentences)         16x16  16x32  32x16  32x32  64x64
    lsp, recovered (the default)                         84.3   84.4   84.1   83.9   83.1
    lsp, the paper's allocation, recovered               84.3   84.3   84.0   84.2   83.0
    the same without the power term                      84.3   84.4   84.1   83.6   84.2
    lsp scores, the same share everywhere, recovered     83.7   82.9   83.0   83.2   83.3
    magnitude, recovered                                 82.4   82.2   82.1   82.0   81.8
    lsp, not recovered                                   79.7   69.3   80.5   74.2   79.3

    ViT on CIFAR-10 (dense 63.9)                        16x16  16x32  32x16  32x32  64x64
    lsp, recovered (the default)                         63.4   62.8   63.2   62.6   62.4
    lsp, the paper's allocation, recovered               63.3   62.9   63.2   62.4   62.4
    the same without the power term                      63.3   62.6   62.9   62.5   62.6
    lsp scores, the same share everywhere, recovered     61.8   60.5   60.3   59.4   50.5
    magnitude, recovered                                 49.2   42.9   47.7   38.1   10.0
    lsp, not recovered                                   62.3   62.2   62.2   62.1   60.7

Rerun, in a checkout: python tools/bench/blocks.py
"""
