"""How what pruning lost is won back by training.

objective    what the student is asked for
parts        which parameters learn
text         what is learnt from, and what is held out
losses       the errors, as formulas
zeros        zeros of a sparse plan stay zero
experts      experts that learn, and what the teacher's own make of the same tokens
rates        learning rates that suit weights of any size
checks       what must fit together first
layer_local  one layer at a time: no gradient crosses layers, and the model need not fit into memory
end_to_end   the whole model, on one process or many
"""
