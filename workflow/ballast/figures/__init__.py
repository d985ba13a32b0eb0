"""Figures for papers: the same results give the same bytes, as SVG and PDF."""
