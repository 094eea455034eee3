"""Lessons: short scripts, each with one thing to see. `python -m benchmarks.lessons.NAME`; seconds on two cores.

    convnet     prune, fine-tune, quantize and store a small ConvNet: the tutorial's exercise, done to the end
    zeros       why pruned weights come back when a network is quantized
    shrinking   why the file did not shrink although nine of ten weights are zero
    sensitivity which layer can be pruned how far
    ticket      the lottery ticket: a sparse network trained from its own first weights, and two controls
    own         compress a network and a loss of one's own, and run it in integers
    table       reproduce a row of a paper's table and read the verdict

All run on scikit-learn's handwritten digits. What they print depends on the machine in the last digits only.
"""
