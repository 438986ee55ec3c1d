CREATE OR REPLACE VIEW customer_analytics AS FROM '~/pipeline-data/gold/customer_analytics/*.parquet';
CREATE OR REPLACE VIEW category_analytics AS FROM '~/pipeline-data/gold/category_analytics/*.parquet';
CREATE OR REPLACE VIEW payment_analytics AS FROM '~/pipeline-data/gold/payment_analytics/*.parquet';
CREATE OR REPLACE VIEW device_analytics AS FROM '~/pipeline-data/gold/device_analytics/*.parquet';
CREATE OR REPLACE VIEW product_analytics AS FROM '~/pipeline-data/gold/product_analytics/*.parquet';
