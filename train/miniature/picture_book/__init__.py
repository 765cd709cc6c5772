"""The picture-book world: things people know on plain grounds and in four places, drawn with exact masks.

`outlines.py` holds the geometry of every thing, `drawing.py` scenes and pixels, `captions.py` the language, `reader.py`
reads a picture back. Beside them the scripts that train and examine the miniature which paints it.
"""
