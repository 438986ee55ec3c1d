"""The least that a PySpark program does: it starts Spark, counts ten rows, and stops."""

from pyspark.sql import SparkSession

spark = SparkSession.builder.getOrCreate()
print(spark.range(10).count())
spark.stop()
