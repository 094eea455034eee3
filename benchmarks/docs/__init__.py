"""The site: a folder of plain HTML made from rows, configs and docstrings. It opens offline."""
