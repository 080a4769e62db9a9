"""One layer at a time, no backward pass through the model, memory bounded by a layer.

noted      what a layer's block is given and puts out, for all text
lesson     a student's block on that: its errors
learn      one block trained
layers     the teacher's pass, and at each layer the student's block brought in, trained and put away
learnt     what a layer has learnt, as a file
settings   how
"""
