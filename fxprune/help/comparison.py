"""Comparison

What each does about pruning a pretrained network. Ours is tested in this repository; what is said of others is from
their documentation, code and issue threads as of 2026 (numbers are issues of the tool). They change: check theirs.

                            fxprune              Torch-Pruning        NNCF                 ModelOpt
--------------------------  -------------------  -------------------  -------------------  -------------------------
sees the network as         torch.export graph   autograd trace and   module graph with    module types it knows
                                                 module types         hooks
heads                       read off the graph   num_heads hints      movement sparsity    known attention classes
other sizes in every layer  yes                  yes (channels)       yes (filters)        FastNAS, Puzzletron; one
                                                                                           size in Minitron
asks for                    FLOPs, parameters    share of channels    share of filters or  FLOPs or parameters
                            or bytes                                  FLOPs                (FastNAS), dimensions or
                                                                                           parameters (Minitron)
data                        some, unlabelled     none, or labels for  training             evaluation in the search
                                                 Taylor
without training after      recovery in closed   accuracy falls       trains while it      fine-tune or distil
                            form, measured       (#55, #347)          prunes
the result is checked       sliced = masked,     no (most of its      -                    in its own tests
                            file = graph, every  tests have no
                            run                  assert)
saved as                    graph and weights,   pickled module       exported model       replayed changes on the
                            no class, no pickle                                            original class
tokens                      merge or drop        no                   no                   no
quantisation                no                   no                   yes, its main work   yes, its main work
2:4, tiles                  zeros and a gate     no                   unstructured         2:4
large language models       structure yes        examples             -                    its main work: depth, MoE,
                            (GQA), not tuned                                               Mamba, Megatron
OpenVINO, TensorRT-LLM      no                   no                   OpenVINO             TensorRT-LLM
training recipes            none                 many examples        schedulers,          distillation at scale
                                                                      distillation
age, users                  young, few           years, many          years, many          years, many

Take another tool when you will train anyway and want many ready recipes (Torch-Pruning), when the target is OpenVINO or
the answer is int8 (NNCF), when the model is a large language model on NVIDIA hardware (ModelOpt). Quantise after
pruning: what fxprune writes is an ordinary graph.

Measured side by side, same model, data and count of MACs: the README's tables have Torch-Pruning's rows (its best of
five settings, chosen on the figure itself), and it leads at 0.9; `python tools/peers/torch_pruning.py` reruns it. NNCF
and ModelOpt were not run.
"""
