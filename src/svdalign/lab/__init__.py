"""The lab: data, networks, training runs, their costs, experiments, reports, command line.

It needs the extra ``svdalign[lab]``. It imports the library; nothing in the library imports it.
"""
